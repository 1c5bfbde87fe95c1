"""benchmarks/gpu without a GPU: its scripts import each other by their plain names."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks/gpu"
sys.path.insert(0, str(GPU))
