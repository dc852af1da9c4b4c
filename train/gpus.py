"""What kinds of GPU can hold and do, from their makers' data sheets."""

from dataclasses import dataclass
from types import MappingProxyType

from schemas.errors import ConfigError

GIB = 1 << 30
NODE_SIZE = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight: GiB that programs can use, dense TFLOP/s, and GB/s one way, of its memory, to its node and
    out of it. TFLOP/s of float32 are those without tensor cores, which round to TF32; None of float8: it multiplies none.
    """

    name: str
    memory_gib: float
    bfloat16_tflops: float
    float32_tflops: float
    memory_gb_s: float
    node_gb_s: float
    network_gb_s: float
    float8_tflops: float | None

    def tflops(self, compute: str) -> float:
        """The most that it does in this dtype."""
        return self.bfloat16_tflops if compute == "bfloat16" else self.float32_tflops


GPUS = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("h100", 79.6, 989.0, 67.0, 3350.0, 450.0, 50.0, 1979.0),
            Gpu("h200", 139.8, 989.0, 67.0, 4800.0, 450.0, 50.0, 1979.0),
            Gpu("a100", 79.2, 312.0, 19.5, 2039.0, 300.0, 25.0, None),
        )
    }
)


def gpu_named(name: str) -> Gpu | None:
    """A kind of GPU by name, None for `cpu`. Raises: ConfigError if none is called so."""
    if name != "cpu" and name not in GPUS:
        raise ConfigError(f"found the GPU {name!r}, expected one of {', '.join(GPUS)}, or cpu")
    return GPUS.get(name)
