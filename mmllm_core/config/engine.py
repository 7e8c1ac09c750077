"""Settings of engines that are not every engine's."""

from typing import Literal

from pydantic import Field

from mmllm_core.config.reading import StrictModel


class VllmConfig(StrictModel):
    """vLLM's own settings."""

    tensor_parallel: int = Field(default=1, gt=0)
    """GPUs that share the LM."""
    quantization: Literal["nf4", "awq", "fp8"] | None = None
    """How vLLM holds the LM's weights: bitsandbytes' NF4, FP8 on GPUs that compute in it, or AWQ for an LM that was
    quantized so beforehand. If None, as the LM's own config says."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes, weights and keys and values together."""
    enforce_eager: bool = False
    """Whether to do without CUDA graphs and compilation: a replica starts sooner and answers later."""

    def objection(self, device: str) -> str | None:
        """Why vLLM cannot do this on a device, `cpu` or `cuda`, and what to do; None if nothing is known against it."""
        if device == "cpu" and self.quantization:
            return f"vllm.quantization: {self.quantization} needs a GPU: leave it out, or serve on one"
        if device == "cpu" and self.tensor_parallel > 1:
            return f"vllm.tensor_parallel: {self.tensor_parallel} GPUs, and the device is cpu: leave it out"
        return None
