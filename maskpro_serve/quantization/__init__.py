"""The quantization method ``maskpro`` of vLLM: packed (N:M) linears on our kernels."""
