"""Hugging Face side of the stack. Importing this package makes exported folders known to transformers:

    import megatron_mm.hf
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

No code from the folder is run, and neither Megatron-Core nor a GPU is needed.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from megatron_mm.hf.configuration import MegatronMMConfig
from megatron_mm.hf.modeling import MegatronMMForConditionalGeneration, MegatronMMModel
from megatron_mm.hf.processing import MegatronMMImageProcessor, MegatronMMProcessor
from megatron_mm.hf.tokenization import MegatronMMTokenizer

AutoConfig.register(MegatronMMConfig.model_type, MegatronMMConfig)
AutoModel.register(MegatronMMConfig, MegatronMMModel)
AutoModelForImageTextToText.register(MegatronMMConfig, MegatronMMForConditionalGeneration)
AutoTokenizer.register(MegatronMMConfig, tokenizer_class=MegatronMMTokenizer)
AutoImageProcessor.register(MegatronMMConfig, image_processor_classes={"pil": MegatronMMImageProcessor})
AutoProcessor.register(MegatronMMConfig, MegatronMMProcessor)

__all__ = [
    "MegatronMMConfig",
    "MegatronMMForConditionalGeneration",
    "MegatronMMImageProcessor",
    "MegatronMMModel",
    "MegatronMMProcessor",
    "MegatronMMTokenizer",
]
