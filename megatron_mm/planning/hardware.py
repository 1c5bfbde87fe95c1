"""What a GPU can do, and which part of it training reaches: the planner's only numbers that come from outside.

Peaks are NVIDIA's data sheets', dense (without sparsity). What training reaches of them is an assumption of ours until
it is measured; each stands in `Assumptions` with its reason.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight, and its share of the node's network."""

    name: str
    bf16: float  # FLOP/s of matrix products, dense
    fp8: float  # FLOP/s, dense
    fp32: float  # FLOP/s outside the tensor cores, which PyTorch's fp32 does not use by default
    fp8_recipes: tuple[str, ...]  # of training.fp8, that it can run
    memory: float  # bytes that a process is offered, as torch.cuda.mem_get_info tells
    bandwidth: float  # of the memory, bytes/s
    nvlink: float  # to the other GPUs of the node, bytes/s in one direction
    network: float  # a GPU's own network card, bytes/s in one direction
    gpus_per_node: int = 8


_HOPPER = ("delayed", "tensorwise", "blockwise")
GPUS = {
    # A100 SXM 80 GB data sheet; DGX A100: 8 × 200 Gb/s.
    "a100": Gpu("A100 80 GB", 312e12, 0.0, 19.5e12, (), 79.1 * GIB, 2.04e12, 300e9, 25e9),
    # H100 SXM data sheet (989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s both ways); DGX H100: 8 × 400 Gb/s.
    "h100": Gpu("H100 80 GB", 989e12, 1979e12, 67e12, _HOPPER, 79.1 * GIB, 3.35e12, 450e9, 50e9),
    # H200 SXM data sheet: Hopper as above with 141 GB at 4.8 TB/s.
    "h200": Gpu("H200 141 GB", 989e12, 1979e12, 67e12, _HOPPER, 139.8 * GIB, 4.8e12, 450e9, 50e9),
    # HGX B200 data sheet, an eighth of it: 18 PFLOP/s bf16, 36 FP8, 0.6 fp32, 1.44 TB, 62 TB/s; NVLink 5;
    # DGX B200: 8 × 400 Gb/s.
    "b200": Gpu("B200 180 GB", 2250e12, 4500e12, 75e12, (*_HOPPER, "mxfp8"), 178.3 * GIB, 7.7e12, 900e9, 50e9),
}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the peaks and reserves, none of them measured here."""

    matmul: float = 0.65  # of peak FLOP/s: large matrix products of decoder and output layer
    fp8_matmul: float = 0.55  # of the FP8 peak, casts and scales counted in
    attention: float = 0.5  # of the bf16 peak: fused attention, forward and backward together
    local_attention: float = 0.15  # of the bf16 peak: scores written to memory and read again
    encoder: float = 0.45  # of peak FLOP/s: the encoder's narrower matrices
    connector: float = 0.1  # of peak FLOP/s: depthwise convolutions do little with each byte
    memory_bandwidth: float = 0.8  # of the memory's peak
    links: float = 0.75  # of NVLink's and the network's peak, large messages
    message: float = 15e-6  # seconds that any message takes beside its bytes
    reserve_fixed: float = 4 * GIB  # CUDA context, cuBLAS and cuDNN workspaces, NCCL's buffers for its groups
    reserve_share: float = 0.05  # of the GPU's memory: fragmentation of PyTorch's allocator
    expert_imbalance: float = 1.2  # tokens that the busiest expert-parallel rank gets, over the mean

    def usable(self, gpu: Gpu) -> float:
        """Bytes of a GPU's memory that training may fill."""
        return gpu.memory * (1 - self.reserve_share) - self.reserve_fixed


ASSUMPTIONS = Assumptions()
