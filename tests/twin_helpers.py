"""Shared by the tests of twins: the types, torch on a twin, pictures and questions."""

import json
from pathlib import Path

import numpy as np

TYPES = ("bert", "llama", "minicpmv4_6", "mistral", "qwen3", "qwen3_5", "qwen3_5_text")
VISION = ("minicpmv4_6", "qwen3_5")
CHAT = tuple(name for name in TYPES if name != "bert")


def torch_model(folder: Path):
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    architecture = getattr(transformers, config["architectures"][0])
    return architecture.from_pretrained(folder, dtype=torch.float32).eval()


def first_output(model, **inputs):
    import torch

    with torch.no_grad():
        output = model(**inputs)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def ids(count=40, vocab=400):
    import torch

    return torch.from_numpy(np.random.default_rng(0).integers(0, vocab, (1, count)))


def picture(width, height):
    from PIL import Image

    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


QUESTION = {"type": "text", "text": "Describe this image."}
CONVERSATION = [{"role": "user", "content": [{"type": "image"}, QUESTION]}]


class WithoutVideo:
    """Answers for the video processor, which needs torchvision, with the image one's facts."""

    def __init__(self, image_processor):
        self.slice_mode = getattr(image_processor, "slice_mode", None)
        self.downsample_mode = getattr(image_processor, "downsample_mode", None)


def torch_inputs(folder, image):
    import transformers

    facts = json.loads((folder / "preprocessor_config.json").read_text())
    processor_class = getattr(transformers, facts["processor_class"])

    class ImagesOnly(processor_class):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor = ImagesOnly(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=WithoutVideo(images),
        chat_template=tokenizer.chat_template,
    )
    prompt = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    return prompt, processor(text=[prompt], images=[image], return_tensors="pt")
