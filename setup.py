"""The package and its extras. Versions that were run together are in constraints/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_mm/__init__.py").read_text())[1]

INGEST = ["lxml", "pyarrow", "zstandard"]  # formats beyond plain JSON lines and tar

setup(
    name="megatron-mm",
    version=VERSION,
    description="Pre-training of MM1-style multimodal LLMs on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_mm", "megatron_mm.*"]),
    package_data={"megatron_mm": ["py.typed"]},
    install_requires=[
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "pillow",
        "pydantic>=2",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "simplejpeg",
        "tokenizers",
        "torch>=2.6",
        "transformers>=5",
    ],
    extras_require={
        "gpu-cu12": ["transformer-engine[core-cu12,pytorch]"],
        "gpu-cu13": ["transformer-engine[core-cu13,pytorch]"],
        "ingest": INGEST,
        "s3": ["botocore"],
        # Decoding on the GPU; on a machine without one it only serves to test the same path.
        "dali-cu12": ["nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12"],
        "dali-cu13": ["nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13"],
        "plot": ["matplotlib"],
        "mpi": ["mpi4py"],  # brings no MPI: the cluster's own is meant (or `pip install mpich`)
        "eval": ["easy-vqa", "psutil"],  # the quickstart's pictures and questions; its kill of a whole process tree
        "log": ["tensorboard"],
        "dev": [
            *INGEST,
            "botocore",
            "easy-vqa",
            "flask",
            "flask-cors",
            "hypothesis",
            "matplotlib",
            "moto[s3]",
            "mpi4py",
            "mpich",
            "mypy",
            "nvidia-dali-cuda130",
            "nvidia-nvimgcodec-cu13",
            "psutil",
            "pytest",
            "pytest-timeout",
            "ruff",
            "tensorboard",
            "types-psutil",
            "types-pyyaml",
        ],
    },
)
