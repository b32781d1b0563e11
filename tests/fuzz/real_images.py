"""Small real images of every format that is read, as encoded bytes."""

import struct
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

SIDE = 24  # pixels


@cache
def real_images() -> dict[str, bytes]:
    """Return encoded images by their file names."""
    photo = _photo()
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(photo.size))
    palette = photo.quantize(16)
    grey, deep = photo.convert("L"), Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description " * 8
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    def saved(image: Image.Image, kind: str, **how: object) -> bytes:
        file = BytesIO()
        image.copy().save(file, kind, **how)  # a copy, for Pillow keeps settings of one format in it for the next
        return file.getvalue()

    files = {
        "rgb.png": saved(photo, "PNG"),
        "rgba.png": saved(alpha, "PNG"),
        "palette.png": saved(palette, "PNG", transparency=3),
        "grey.png": saved(grey, "PNG"),
        "bits.png": saved(photo.convert("1"), "PNG"),
        "16bit.png": saved(deep, "PNG"),
        "icc_exif.png": saved(photo, "PNG", icc_profile=profile, exif=exif),
        "animated.png": saved(photo, "PNG", save_all=True, append_images=_frames(photo)),
        "baseline.jpg": saved(photo, "JPEG", quality=80),
        "progressive.jpg": saved(photo, "JPEG", progressive=True),
        "grey.jpg": saved(grey, "JPEG"),
        "cmyk.jpg": saved(photo.convert("CMYK"), "JPEG"),
        "exif_icc.jpg": saved(photo, "JPEG", exif=exif, icc_profile=profile),
        "restart.jpg": saved(photo, "JPEG", restart_marker_blocks=1, subsampling=0),
        "mpo.jpg": saved(photo, "MPO", save_all=True, append_images=_frames(photo)),
        "lossy.webp": saved(photo, "WEBP"),
        "lossless.webp": saved(alpha, "WEBP", lossless=True),
        "animated.webp": saved(photo, "WEBP", save_all=True, append_images=_frames(photo)),
        "plain.gif": saved(palette, "GIF"),
        "animated.gif": saved(palette, "GIF", save_all=True, append_images=_frames(photo), loop=0),
        "rgb.bmp": saved(photo, "BMP"),
        "palette.bmp": saved(palette, "BMP"),
        "raw.tif": saved(photo, "TIFF"),
        "lzw.tif": saved(photo, "TIFF", compression="tiff_lzw"),
        "deflate.tif": saved(alpha, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": saved(photo, "TIFF", compression="jpeg"),
        "fax.tif": saved(photo.convert("1"), "TIFF", compression="group4"),
        "16bit.tif": saved(deep, "TIFF"),
        "float.tif": saved(floats, "TIFF"),
        "cmyk.tif": saved(photo.convert("CMYK"), "TIFF", exif=exif),
        "pages.tif": saved(photo, "TIFF", save_all=True, append_images=_frames(photo)),
        "tiled.tif": _tiled(grey),
        "rgb.ppm": saved(photo, "PPM"),
        "grey.pgm": saved(grey, "PPM"),
        "text.pgm": b"P2\n# text\n4 2\n255\n0 10 20 30\n40 50 60 255\n",
        "rgb.jp2": saved(photo, "JPEG2000"),
        "alpha.j2k": saved(alpha, "JPEG2000", irreversible=True, no_jp2=True),
        "icon.ico": saved(alpha, "ICO", sizes=[(16, 16), (24, 24)]),
        "icon.icns": saved(alpha.resize((32, 32)), "ICNS"),
        "rgb.tga": saved(alpha, "TGA", compression="tga_rle"),
        "palette.pcx": saved(palette, "PCX"),
        "rgb.sgi": saved(photo, "SGI"),
        "rgba.dds": saved(alpha, "DDS"),
        "bits.xbm": saved(photo.convert("1"), "XBM"),
        "bits.msp": saved(photo.convert("1"), "MSP"),
        "float.spider": saved(floats, "SPIDER"),
        "rgb.qoi": saved(photo, "QOI"),
        "palette.blp": saved(palette, "BLP"),
    }
    if "AVIF" in Image.SAVE:
        files["rgb.avif"] = saved(photo, "AVIF")
    for name, values in {
        "grey.npy": np.asarray(grey),
        "rgb.npy": np.asarray(photo),
        "nine.npy": np.repeat(np.asarray(deep)[..., None], 9, axis=2),
        "fortran.npy": np.asfortranarray(np.asarray(deep)),
    }.items():
        file = BytesIO()
        np.save(file, values)
        files[name] = file.getvalue()
    return files


@cache
def real_masks() -> dict[str, bytes]:
    """Return masks of SIDE x SIDE pixels with the classes 0 to 2 and 255."""
    classes = np.indices((SIDE, SIDE)).sum(axis=0) % 3
    classes[:, -2:] = 255
    picture = Image.fromarray(classes.astype(np.uint8))
    masks = {}
    for name, image, kind in (
        ("grey.png", picture, "PNG"),
        ("palette.png", picture.convert("P"), "PNG"),
        ("16bit.png", Image.fromarray(classes.astype(np.uint16)), "PNG"),
        ("grey.tif", picture, "TIFF"),
        ("palette.gif", picture.convert("P"), "GIF"),
        ("grey.bmp", picture, "BMP"),
    ):
        file = BytesIO()
        image.save(file, kind)
        masks[name] = file.getvalue()
    return masks


def _frames(photo: Image.Image) -> list[Image.Image]:
    return [photo.rotate(90), photo.rotate(180)]


def _photo() -> Image.Image:
    rng = np.random.default_rng(0)
    down, across = np.indices((SIDE, SIDE))
    pixels = np.stack([down * 9, across * 9, 128 + 80 * np.sin(down / 3)], axis=-1) + rng.normal(0, 6, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _tiled(grey: Image.Image) -> bytes:
    """Return a TIFF of tiles of 16 x 16 pixels, which Pillow only reads."""
    padded = np.zeros((32, 32), np.uint8)
    padded[:SIDE, :SIDE] = np.asarray(grey)
    tiles = [padded[down : down + 16, across : across + 16].tobytes() for down in (0, 16) for across in (0, 16)]
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[258], tags[259], tags[262], tags[277] = SIDE, SIDE, 8, 1, 1, 1
    tags[322], tags[323] = 16, 16
    offsets = tuple(8 + 256 * tile for tile in range(4))
    tags[324], tags[325] = offsets, (256,) * 4
    for tag in (324, 325):
        tags.tagtype[tag] = 4
    body = b"".join(tiles)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + tags.tobytes(8 + len(body))
