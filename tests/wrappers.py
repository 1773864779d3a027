"""A tiny Idefics 3: a Llama in a vision wrapper, with everything that vLLM needs for images.

Of the wrappers whose image tokens are causal, it is one that vLLM serves without torchvision.
"""

import json
from pathlib import Path
from typing import Any

import torch

NUM_LAYERS = 2
IMAGE_SIZE, PATCH_SIZE, SCALE = 112, 4, 2
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // SCALE) ** 2
FRAME_TOKENS = 3
"""What the processor adds around each image."""
ADDED = [
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<s>", "</s>",
    "<pad>",
]  # fmt: skip
IMAGE_TOKEN, _, _, _, BOS, EOS, PAD = range(256, 256 + len(ADDED))
"""Tokens after those of the 256 bytes."""

_TEXT = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # so that rows attend to some keys more than to others
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "initializer_range": 0.2,
}


def save(directory: Path) -> Path:
    """Writes the model with random weights, its tokenizer and its processor."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    config = Idefics3Config(
        text_config=_TEXT,
        vision_config=_VISION,
        image_token_id=IMAGE_TOKEN,
        pad_token_id=PAD,
        scale_factor=SCALE,
        architectures=["Idefics3ForConditionalGeneration"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).float().save_pretrained(directory)
    _save_tokenizer(directory)
    edge = {"longest_edge": IMAGE_SIZE}
    images = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": edge,
        "max_image_size": edge,
        "do_image_splitting": False,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": IMAGE_TOKENS}
    (directory / "processor_config.json").write_text(json.dumps(processor))
    return directory


def image(seed: int) -> Any:
    """A random image."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    shape = IMAGE_SIZE, IMAGE_SIZE, 3
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(ADDED)
    *_, bos, eos, pad = ADDED
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    ).save_pretrained(directory)
