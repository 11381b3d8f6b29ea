"""vLLM's engine and its one worker in one process."""

from __future__ import annotations

from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from maskpro_kernels.threads import bind_threads


class OneProcessExecutor(UniProcExecutor):
    """The executor vLLM uses on one GPU, with OpenMP threads bound as ``VLLM_CPU_OMP_THREADS_BIND`` says.

    vLLM has them bound by the environment that a process starts with, so on CPUs it starts one for the worker, in which
    its libraries take memory and time once more. Here they are bound from within.
    """

    def _init_executor(self) -> None:
        openmp = OMPProcessManager(self.vllm_config)
        for cores in openmp.cpu_lists:  # of the one worker; none with `nobind`
            bind_threads(cores)
        with openmp.configure_omp_envs(rank=0, local_rank=0):  # read by vLLM, too late for OpenMP
            super()._init_executor()
