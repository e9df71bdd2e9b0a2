"""Where the files of each data set come from: address, size and checksum, each with the place it was read.

A checksum that no source at hand gives is pinned at the first use (see `fetch.pin`), which detects a later change but
proves nothing about the first file.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Remote", "FILES"]


@dataclass(frozen=True)
class Remote:
    """One file of a data set."""

    file: str  # name under which the file is kept
    url: str | None  # address to fetch it from; None where there is no public one
    size: int | None = None  # bytes, or None where no source gives it
    checksum: str | None = None  # "md5:<hex>" or "sha256:<hex>", or None where no source gives it
    source: str = "no source gives size or checksum"  # where size and checksum were read
    hint: str = ""  # for a file without an address, how to get it


_TORCHVISION = "torchvision 0.29 source, datasets"
_TFDS = "tensorflow/datasets, tensorflow_datasets/url_checksums"
_DOGS = "http://vision.stanford.edu/aditya86/ImageNetDogs"
_MIT = "https://web.mit.edu/torralba/www"
_CALTECH = "https://data.caltech.edu/records"


def _development(file: str, size: int, sha256: str) -> tuple[Remote, ...]:
    source = "the project's own list of development archives (ImageFolder trees of small images)"
    hint = "it has no public address: ask the project's maintainers for it, or give the path of an ImageFolder tree"
    return (Remote(file, None, size, f"sha256:{sha256}", source, hint),)


def _imagenet(folder: str, md5: str) -> Remote:
    hint = f"the folder that ILSVRC2012_img_{folder}.tar gives, md5 {md5}, from image-net.org after registration"
    return Remote(folder, None, source=f"the md5 of the archive: {_TORCHVISION}/imagenet.py", hint=hint)


FILES: dict[str, tuple[Remote, ...]] = {
    "stanford-dogs": (
        Remote("images.tar", f"{_DOGS}/images.tar", 793579520,
               "sha256:a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
               f"{_TFDS}/stanford_dogs.txt"),
        Remote("lists.tar", f"{_DOGS}/lists.tar", 481280,
               "sha256:34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c",
               f"{_TFDS}/stanford_dogs.txt"),
    ),
    # https://web.mit.edu/torralba/www/indoor.html; another project noted that the archive's address answered 404 in
    # September 2026, so it may have to be fetched from a copy.
    "mit-indoors": (
        Remote("indoorCVPR_09.tar", "http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar"),
        *(Remote(file, f"{_MIT}/{file}") for file in ("TrainImages.txt", "TestImages.txt")),
    ),
    # The older vision.caltech.edu and Google Drive addresses are gone.
    "caltech-256": (
        Remote("256_ObjectCategories.tar", f"{_CALTECH}/nyy15-4j048/files/256_ObjectCategories.tar", None,
               "md5:67b4f42ca05d46448c6bb8ecd2220f6d", f"{_TORCHVISION}/caltech.py"),
    ),
    # Size and sha256 are of the same archive on Google Drive.
    "cub-200-2011": (
        Remote("CUB_200_2011.tgz", f"{_CALTECH}/65de6-vp158/files/CUB_200_2011.tgz", 1150585339,
               "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
               f"{_TFDS}/caltech_birds2011.txt and pytorch/vision, prototype/datasets/_builtin/cub200.py"),
    ),
    "food-101": (
        Remote("food-101.tar.gz", "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", 4996278331,
               "md5:85eeb15f3717b99a5da872d97d918f87", f"md5: {_TORCHVISION}/food101.py; size: {_TFDS}/food101.txt"),
    ),
    # https://image-net.org/challenges/LSVRC/2012/2012-downloads.php, after registration; see data/imagenet.py.
    "imagenet": (
        _imagenet("train", "1d675b47d978889d74fa0da5fadfb00e"), _imagenet("val", "29b22e2961454d5413ddabcf34fc5622"),
    ),
    "cifar10": (
        Remote("cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", None,
               "md5:c58f30108f718f92721af3b95e74349a", f"{_TORCHVISION}/cifar.py"),
    ),
    "cifar10-jpeg": _development("cifar10.tar.xz", 18549716,
        "5f21d65a6af399ef2eba3dc2a119e209c877e755db8efce6769adc57bf7fbd2b"),
    "tiny-imagenet-32": _development("tiny-imagenet-32.tar.xz", 34608024,
        "99321bc67fb665e27c1a6e77d9d166915de889b6f1272dc3462eb58eaa069c06"),
    "hymenoptera-160": _development("hymenoptera-160.tar", 5560320,
        "8607b28133f8fd220299b97d7d955e1b7ab47c12cd0f9b3c1aa83093e11a811b"),
    "stanford-dogs-144": (
        *_development("stanford-dogs-144-train-001-030.tar.xz", 20411676,
            "bf5fc708cc8c2c8af99d7cebfdcdf70c03ad1af5ee46ebb845a7824a770923c7"),
        *_development("stanford-dogs-144-train-031-060.tar.xz", 20241172,
            "14e8a11df468c69afa7e97a4bb26efc914d3faa02d0cfcaf9fbc6222d2261f37"),
        *_development("stanford-dogs-144-test.tar.xz", 48822196,
            "1a64c1f08be8d4b57766e419ecbf5108061f58678f6081ae88b1d3837c9c231f"),
    ),
    "caltech101-144": _development("caltech101-144.tar.xz", 31804824,
        "1904b349c50bdac39ad5814cbe0d651e10eec9adebe651300193c4cbb3d0f5ce"),
}  # fmt: skip
