"""Encoded pictures to the encoder's input: uint8 [n, 3, size, size]. They become floats on the device, not here.

decoder.py   what the backends share: checksums, the stand-in for a bad picture, counts, the limit
cpu.py       simplejpeg, else Pillow, then torch's antialiased bicubic: exact, and the fastest on a CPU
dali.py      NVIDIA DALI, on a CPU or on a GPU
"""

from megatron_mm.data.decode.cpu import CpuBackend, decode_image, resize
from megatron_mm.data.decode.dali import DaliBackend, check_dali
from megatron_mm.data.decode.decoder import Decoder, EncodedImage

__all__ = ["CpuBackend", "DaliBackend", "Decoder", "EncodedImage", "check_dali", "decode_image", "resize"]
