"""Pictures and text → what the model reads, by the rules of training.

An image is squashed to image_size² by training's own resize, on uint8, and normalised as in the trained model.
`<image>` in a text becomes `tokens_per_image` image tokens; bos comes first.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import ImageInput, make_flat_list_of_images

from megatron_mm.data.decode import resize
from megatron_mm.data.tokenizer import IMAGE_PIECE
from megatron_mm.errors import UserError

_TEXT_OPTIONS = (
    "padding", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask", "return_tensors", "verbose",
)  # fmt: skip


def to_pixels(image: Any) -> Tensor:
    """A PIL image of 8 bits, or an array or tensor of uint8 [h, w, 3] or [3, h, w] → uint8 [3, h, w].

    A PIL image is turned upright and laid over white where it is transparent. Files are best read by
    `megatron_mm.data.decode.decode_image`, with training's own decoders; its tensors go through as they are.
    """
    if isinstance(image, Image.Image) and not image.mode.startswith(("I", "F")):
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2]):
        raise UserError(
            "not an image of 8 bits", where="images", found=f"{pixels.dtype} of shape {list(pixels.shape)}",
            allowed="PIL images, or uint8 arrays [h, w, 3] or [3, h, w]",
        )  # fmt: skip
    return pixels if pixels.shape[0] == 3 else pixels.permute(2, 0, 1)


class MegatronMMImageProcessor(BaseImageProcessor):
    """Images → `pixel_values`, float32 [n, 3, image_size, image_size]."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 (as in the base class)

    def __init__(
        self,
        image_size: int = 378,
        image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073),
        image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size, self.image_mean, self.image_std = image_size, list(image_mean), list(image_std)

    def resized(self, images: ImageInput) -> Tensor:
        """uint8 [n, 3, image_size, image_size]: what training puts into its batches."""
        flat = make_flat_list_of_images(self.fetch_images(images))
        return torch.stack([resize(to_pixels(image), self.image_size) for image in flat])

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] → float32, in the order of operations of the trained model."""
        mean = torch.tensor([255 * m for m in self.image_mean]).view(1, 3, 1, 1)
        std = torch.tensor([255 * s for s in self.image_std]).view(1, 3, 1, 1)
        return (pixels.float() - mean) / std

    def preprocess(self, images: ImageInput, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        return BatchFeature({"pixel_values": self.normalized(self.resized(images))}, tensor_type=return_tensors)


class MegatronMMProcessor(ProcessorMixin):
    """`processor(images=[...], text=["<image> Question: …"], return_tensors="pt", padding=True)`.

    Images of all texts come in one list, in the order of their placeholders.
    """

    image_processor: MegatronMMImageProcessor
    tokenizer: PreTrainedTokenizerBase  # see `exported_tokenizer`

    def __init__(
        self,
        image_processor: MegatronMMImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokens_per_image: int = 144,
        **kwargs: Any,
    ) -> None:
        self.tokens_per_image = tokens_per_image
        self.image_token = IMAGE_PIECE
        self.image_token_id = tokenizer.image_token_id if tokenizer is not None else None
        super().__init__(image_processor, tokenizer, **kwargs)

    def token_ids(self, text: str, bos: bool = True) -> list[int]:
        """bos, and the ids of training: each stretch between two `<image>` is encoded by itself."""
        ids = [self.tokenizer.bos_token_id] if bos else []
        for i, part in enumerate(text.split(self.image_token)):
            ids += [self.image_token_id] * (self.tokens_per_image if i else 0)
            ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """`input_ids`, `attention_mask` and `pixel_values`.

        Args:
            kwargs: `return_tensors`, and how to pad: `padding`, `max_length`, `pad_to_multiple_of`, `padding_side`.
                `add_special_tokens=False` leaves bos out.
        """
        texts = [text] if isinstance(text, str) else text
        self.validate_inputs(images=images, text=texts)
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        for_text = options["text_kwargs"]
        data: dict[str, Any] = {}
        if texts is not None:
            bos = for_text.pop("add_special_tokens", True)
            if unknown := sorted(key for key, value in for_text.items() if value and key not in _TEXT_OPTIONS):
                raise UserError(
                    "not an option here", where="processor(…)", found=", ".join(unknown),
                    allowed=", ".join((*_TEXT_OPTIONS, "add_special_tokens")),
                )  # fmt: skip
            padding = {key: value for key, value in for_text.items() if key in _TEXT_OPTIONS}
            ids = [self.token_ids(t, bos) for t in texts]
            data |= self.tokenizer.pad({"input_ids": ids}, **{"padding": False, **padding})
        if images is not None:
            data |= self.image_processor(images, **options["images_kwargs"])
        return BatchFeature(data, tensor_type=for_text.get("return_tensors"))

    def validate_inputs(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> None:
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            wanted = sum(t.count(self.image_token) for t in texts)
            given = 0 if images is None else len(make_flat_list_of_images(images))
            if wanted != given:
                raise UserError(
                    "prompts and images disagree", where="processor(images=…, text=…)",
                    found=f"{wanted} {self.image_token} in the text and {given} images",
                    allowed="one image for each placeholder",
                )  # fmt: skip
        super().validate_inputs(images=images, text=text, **kwargs)
