"""DINOv2: pictures cropped to a size that is not the table of positions' own."""

from validate.twin.family import Family, Files, Json

TABLE_SIDE, CROP_SIDE = 6, 8
"""Patches per side of the table of positions and of a picture, which differ in releases too."""


def _adjust(config: Json, source: Json) -> Json:
    del source
    config["image_size"] = TABLE_SIDE * config["patch_size"]
    return config


def _processor(config: Json) -> Files:
    side = CROP_SIDE * config["patch_size"]
    images = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side * 8 // 7},
    }
    return {"preprocessor_config.json": images}


FAMILY = Family(adjust=_adjust, processor=_processor)
