"""Named settings: ``build(kind, channels=…, **settings)``. What they cost is in docs/networks-notes.md."""

from __future__ import annotations

PRESETS: dict[str, tuple[str, dict]] = {
    # 8×8 images of 17 levels on two CPU cores, in seconds; the Fourier features have periods of four and two levels
    "digits": (
        "unet",
        {
            "widths": (32, 64),
            "blocks": 1,
            "attention": (),
            "heads": 2,
            "learned_resampling": False,
            "fourier": (2, 3),
        },
    ),
    # 8-bit images of 28 to 64 pixels on two CPU cores, in minutes; the Fourier features as for digits
    "cpu-small": (
        "unet",
        {
            "widths": (64, 96),
            "blocks": 1,
            "attention": (),
            "heads": 3,
            "patch": 2,
            "learned_resampling": False,
            "fourier": (6, 7),
            "norm": "layer",
        },
    ),
    # images of 32 to 64 pixels on one GPU
    "gpu": (
        "unet",
        {"widths": (128, 256, 256), "blocks": 3, "attention": (1, 2), "heads": 4, "dropout": 0.1, "scale_shift": True},
    ),
    # Ho et al. 2020, CIFAR-10: 35,746,307 parameters with 3 channels
    "ddpm-cifar10": (
        "unet",
        {"widths": (128, 256, 256, 256), "blocks": 2, "attention": (1,), "heads": 1, "dropout": 0.1},
    ),
    "vector": ("mlp", {"width": 256, "depth": 4}),
    # sequences of some hundred steps
    "series": ("unet", {"dims": 1, "widths": (64, 128, 128), "blocks": 1, "attention": (2,), "heads": 4}),
    # volumes of about 16 to 32 cells a side
    "volume": ("unet", {"dims": 3, "widths": (32, 64), "blocks": 1, "attention": (), "heads": 2, "patch": 2}),
}
