"""Greedy answers to many prompts: batches of similar length, every image encoded once, a key-value cache."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from megatron_mm.data.decode import decode_image
from megatron_mm.data.ingest.images import BadImageError
from megatron_mm.errors import UserError
from megatron_mm.hf.modeling import MegatronMMForConditionalGeneration
from megatron_mm.hf.processing import MegatronMMProcessor

CAPTION_STOPS = ("\n",)
VQA_STOPS = ("\n", ".", ",", "Question")

Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Prompt:
    """Text with `<image>` placeholders and the image files that stand there, in order."""

    text: str
    images: tuple[Path, ...]


class ImageFeatures:
    """The connector's outputs of image files. The most recently used stay, up to `max_bytes`."""

    def __init__(
        self,
        model: MegatronMMForConditionalGeneration,
        processor: MegatronMMProcessor,
        batch_size: int,
        max_bytes: int = 4 << 30,
    ) -> None:
        self.model, self.processor, self.batch_size, self.max_bytes = model, processor, batch_size, max_bytes
        self._kept: OrderedDict[Path, Tensor] = OrderedDict()

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """[len(paths), tokens_per_image, hidden], on the model's device."""
        missing = [path for path in dict.fromkeys(paths) if path not in self._kept]
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            pixels = self.processor.image_processor([_read(path) for path in batch])["pixel_values"]
            features = self.model.get_image_features(pixels.to(self.model.device)).pooler_output
            self._kept.update(zip(batch, features.clone(), strict=True))
        for path in paths:
            self._kept.move_to_end(path)
        found = torch.stack([self._kept[path] for path in paths])
        while len(self._kept) * found[0].nbytes > self.max_bytes:
            self._kept.popitem(last=False)
        return found


def _read(path: Path) -> Tensor:
    try:
        return decode_image(path.read_bytes())
    except (OSError, BadImageError) as error:
        raise UserError("cannot read an image", where=str(path), found=error) from None


class Generator:
    """Answers prompts with one model.

    Args:
        batch_size: prompts at a time, at most.
        batch_positions: positions (prompts times the longest) at a time, at most; bounds memory for long prompts.
    """

    def __init__(
        self,
        model: MegatronMMForConditionalGeneration,
        processor: MegatronMMProcessor,
        batch_size: int = 64,
        batch_positions: int = 1 << 14,
    ) -> None:
        self.model, self.processor, self.tokenizer = model.eval(), processor, processor.tokenizer
        self.batch_size, self.batch_positions = batch_size, batch_positions
        self.features = ImageFeatures(model, processor, batch_size)
        self.never = torch.tensor(model.generation_config.suppress_tokens or [], dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        stops: Sequence[str],
        progress: Progress = lambda done, total: None,
    ) -> list[str]:
        """Answers in the order of the prompts, each cut before the first of `stops` and stripped."""
        token_ids = [self._encode(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(token_ids[i]))
        answers = [""] * len(prompts)
        done = 0
        while done < len(order):
            # The longest of a batch is its last; a batch of one always fits.
            size = 1
            while (
                size < self.batch_size
                and done + size < len(order)
                and (size + 1) * len(token_ids[order[done + size]]) <= self.batch_positions
            ):
                size += 1
            batch = order[done : done + size]
            images = [path for i in batch for path in prompts[i].images]
            for i, answer in zip(
                batch, self._batch([token_ids[i] for i in batch], images, max_new_tokens, stops), strict=True
            ):
                answers[i] = answer
            done += size
            progress(done, len(order))
        return answers

    def _encode(self, prompt: Prompt) -> list[int]:
        image_token = self.processor.image_token
        if prompt.text.count(image_token) != len(prompt.images):
            raise UserError(
                "prompt and images disagree", where=repr(prompt.text),
                found=f"{prompt.text.count(image_token)} {image_token} and {len(prompt.images)} images",
            )  # fmt: skip
        return self.processor.token_ids(prompt.text)

    def _batch(
        self, token_ids: list[list[int]], images: list[Path], max_new_tokens: int, stops: Sequence[str]
    ) -> list[str]:
        device, longest = self.model.device, max(map(len, token_ids))
        pad = self.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in token_ids], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in token_ids], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=self.features(images))} if images else None
        generated: list[list[int]] = [[] for _ in token_ids]
        texts = [""] * len(token_ids)
        finished = [False] * len(token_ids)
        cache = None
        for _ in range(max_new_tokens):
            out = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                mm_encoder_outputs=encoded,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, encoded = out.past_key_values, None
            chosen = out.logits[:, -1].index_fill(1, self.never, -torch.inf).argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                if finished[row]:
                    continue
                generated[row].append(token)
                text = self.tokenizer.decode(generated[row], skip_special_tokens=True)
                found = [at for at in map(text.find, stops) if at >= 0]
                texts[row] = text[: min(found, default=len(text))].strip()
                finished[row] = bool(found) or token == self.tokenizer.eos_token_id
            if all(finished):
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return texts
