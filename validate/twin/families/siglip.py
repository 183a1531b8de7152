"""SigLIP as a pair of towers: texts of at most 64 tokens, pictures of one size."""

from validate.twin.families.llava import small_pictures
from validate.twin.family import Family, Files, Json


def _adjust(config: Json, source: Json) -> Json:
    del source
    # What two towers are compared by has one width.
    config["text_config"]["projection_size"] = config["vision_config"]["hidden_size"]
    return small_pictures(config)


def _processor(config: Json) -> Files:
    size = config["vision_config"]["image_size"]
    images = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "size": {"height": size, "width": size},
    }
    return {"preprocessor_config.json": images}


FAMILY = Family(adjust=_adjust, processor=_processor)
