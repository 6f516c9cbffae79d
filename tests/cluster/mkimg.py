#!/usr/bin/env python3
"""Write container images as one OCI archive, without a registry or a builder.

usage: mkimg.py SPEC.json OUT.tar

SPEC is a list of images:
  [{"ref": "localhost/x/y:1",
    "config": {"Entrypoint": [...], "Env": [...], "User": "..."},
    "layers": ["root.tar", {"/bin/tool": "path/of/tool", "/bin/other": "-> /bin/tool"}]}]
A layer is an uncompressed tar file, or a map from a path in the image to a file here or to the target of
a link. Layers that several images share are stored once. The archive is for `ctr images import`, which
takes each image's name from its annotation.
"""

import hashlib
import io
import json
import platform
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    images = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sys.argv[2], "w") as out:
        archive = Archive(out, Path(folder))
        index = [archive.put_image(image) for image in images]
        archive.put("index.json", json.dumps({"schemaVersion": 2, "manifests": index}).encode())
        archive.put("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')


class Archive:
    def __init__(self, out: tarfile.TarFile, folder: Path) -> None:
        self._out = out
        self._folder = folder
        self._written: set[str] = set()
        self._digests: dict[Path, str] = {}

    def put(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._out.addfile(info, io.BytesIO(content))

    def put_image(self, image: dict[str, Any]) -> dict[str, Any]:
        """Write one image; returns its entry for the index."""
        layers = [self._put_layer(layer) for layer in image["layers"]]
        config = {
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": image["config"],
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, **self._put_blob(json.dumps(config).encode())},
            "layers": layers,
        }
        return {
            "mediaType": MANIFEST,
            **self._put_blob(json.dumps(manifest).encode()),
            "annotations": {"io.containerd.image.name": image["ref"]},
        }

    def _put_layer(self, layer: str | dict[str, str]) -> dict[str, Any]:
        path = self._tar_of(layer) if isinstance(layer, dict) else Path(layer)
        if path not in self._digests:
            with path.open("rb") as file:
                self._digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
        digest = self._digests[path]
        if digest not in self._written:
            self._written.add(digest)
            self._out.add(path, arcname=f"blobs/sha256/{digest}")
        return {"mediaType": LAYER, "digest": f"sha256:{digest}", "size": path.stat().st_size}

    def _put_blob(self, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._written:
            self._written.add(digest)
            self.put(f"blobs/sha256/{digest}", content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    def _tar_of(self, files: dict[str, str]) -> Path:
        """A layer with these files, without times or owners: the same files give the same digest."""
        path = self._folder / f"layer{len(self._digests)}.tar"
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for inside, source in sorted(files.items()):
                info = tarfile.TarInfo(inside.lstrip("/"))
                info.mode = 0o755
                if source.startswith("-> "):
                    info.type, info.linkname = tarfile.SYMTYPE, source.removeprefix("-> ")
                    tar.addfile(info)
                    continue
                info.size = Path(source).stat().st_size
                with Path(source).open("rb") as content:
                    tar.addfile(info, content)
        return path


if __name__ == "__main__":
    main()
