#!/usr/bin/env bash
# Brings what a GPU node without a network needs:
#   prepare.sh download DIR [PYTHON_VERSION]   on a machine with a network: wheels for the node's Python (3.12)
#   prepare.sh install DIR SITE                on the node: then `export PYTHONPATH=SITE:$PWD`, in the project's folder
# What the node has already may be deleted from DIR before: numpy, pyarrow, pytest, and CUDA's libraries (nvidia-*) but
# for the runtime and nvJitLink, where PyTorch for CUDA 13 is installed. Those are then linked: FAISS and cuVS look for
# all of CUDA's libraries beside themselves.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
what=${1:?download or install}; dir=${2:?the folder of the wheels}
case "$what" in
download)
    platforms=(); for each in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux2010 manylinux_2_12 manylinux1; do
        platforms+=(--platform "${each}_x86_64")
    done
    python3 -m pip download --only-binary=:all: --implementation cp --python-version "${3:-3.12}" \
        "${platforms[@]}" --dest "$dir" --requirement "$here/requirements.txt"
    ;;
install)
    site=${3:?the folder to install into}
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$dir"/*.whl
    mkdir -p "$site/nvidia"
    python3 - "$site" <<'END'
import pathlib, sys
import importlib.util
site = pathlib.Path(sys.argv[1])
found = importlib.util.find_spec("nvidia")
for folder in map(pathlib.Path, found.submodule_search_locations if found else ()):
    for library in sorted(folder.iterdir()):
        own = site / "nvidia" / library.name
        if library.is_dir() and own != library and not own.exists():
            own.symlink_to(library)
        elif library.is_dir() and own.is_dir() and not own.is_symlink():
            for name in sorted((library / "lib").glob("*.so*")):  # one folder of several packages: only what lacks
                target = own / "lib" / name.name
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(name)
END
    PYTHONPATH="$site" python3 -c 'import faiss; print("FAISS", faiss.__version__, "sees", faiss.get_num_gpus(), "GPUs")'
    ;;
*) echo "download or install, not $what" >&2; exit 2 ;;
esac
