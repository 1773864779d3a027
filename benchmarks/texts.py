"""More kinds of text for the tuner's benchmark, from Debian's packages.

    python -m benchmarks.texts DIR

Writes two texts of each kind, which have nothing in common, as ``NAME-calibration.txt`` and
``NAME-measured.txt``. Prints the arguments of ``tuner_arms --texts`` that name them:

- *austen*: novels by Jane Austen (public domain): Northanger Abbey and Persuasion to calibrate on,
  Emma to measure on.
- *postgres*: the PostgreSQL 15 manual (PostgreSQL licence). Its pages go to the two texts in turn.

Needs ``apt-get`` and ``dpkg-deb``, as on Debian and Ubuntu, and a network. For a machine without a
network, write the texts elsewhere and copy them.
"""

import argparse
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

MAX_CHARACTERS = 600_000
"""Longest text: more than the windows of five seeds need."""
_NOVELS = (
    "emma",
    "mansfield park",
    "northanger abbey",
    "persuasion",
    "pride and prejudice",
    "sense and sensibility",
)
# R writes a string of ASCII as this word, its length and its bytes.
_R_STRING = b"\x00\x04\x00\x09"
_SHORTEST_PAGE = 2000  # characters; shorter pages are lists of links

_BEFORE = dict.fromkeys(("p", "h1", "h2", "h3", "li", "dt", "pre"), "\n\n")
_BEFORE |= {"tr": "\n", "td": " ", "br": "\n"}


def austen(root: Path) -> tuple[str, str]:
    """Reads the novels from an unpacked ``r-cran-janeaustenr``."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = {}
    for name in _NOVELS:  # the database holds them in this order
        # Each is the size of the serialised object, then the object, deflated.
        inflater = zlib.decompressobj()
        novels[name] = "\n".join(r_strings(inflater.decompress(data[4:])))
        data = inflater.unused_data
    return novels["northanger abbey"] + "\n\n" + novels["persuasion"], novels["emma"]


def r_strings(serialised: bytes) -> list[str]:
    """Reads the strings of a serialised R character vector."""
    strings = []
    at = serialised.find(_R_STRING)
    while serialised.startswith(_R_STRING, at):
        (size,) = struct.unpack_from(">I", serialised, at + 4)
        strings.append(serialised[at + 8 : at + 8 + size].decode("ascii"))
        at += 8 + size
    return strings


def postgres(root: Path) -> tuple[str, str]:
    """Reads the manual from an unpacked ``postgresql-doc-15``."""
    pages = []
    for path in sorted((root / "usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
        if len(page.text) >= _SHORTEST_PAGE:
            pages.append(page.text)
    return "\n\n".join(pages[::2]), "\n\n".join(pages[1::2])


class _Page(HTMLParser):
    """The text of a page between its navigation bars."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._bar = 0  # depth of divs within a bar

    @property
    def text(self) -> str:
        lines = (line.rstrip() for line in "".join(self._parts).splitlines())
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and (self._bar or dict(attrs).get("class") in ("navheader", "navfooter")):
            self._bar += 1
        self._parts.append(_BEFORE.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._bar:
            self._bar -= 1

    def handle_data(self, data: str) -> None:
        if not self._bar:
            self._parts.append(data)


SOURCES = {"austen": ("r-cran-janeaustenr", austen), "postgres": ("postgresql-doc-15", postgres)}


def unpack(package: str, directory: Path) -> Path:
    """Downloads a package of the system's release and unpacks it, installing nothing.

    Raises:
        CalledProcessError: The package cannot be downloaded or unpacked.
    """
    subprocess.run(["apt-get", "download", "-qq", package], cwd=directory, check=True)
    archive = next(directory.glob(f"{package}_*.deb"))
    root = directory / package
    subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args(argv).directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, (package, read) in SOURCES.items():
        with tempfile.TemporaryDirectory() as folder:
            texts = read(unpack(package, Path(folder)))
        files = [directory / f"{name}-{use}.txt" for use in ("calibration", "measured")]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text[:MAX_CHARACTERS] + "\n", encoding="utf-8")
        print(f"{name}={files[0]},{files[1]}")


if __name__ == "__main__":
    main()
