# edgereg on JetPack 7.0 and 7.1 (Thor): CUDA 13.0, TensorRT 10.13.3, Python 3.12.
#   docker build -f deploy/box/jetpack7.Dockerfile -t edgereg:jetpack7 .
#   docker run --rm --runtime nvidia -v "$PWD/photos.bundle:/bundle:ro" edgereg:jetpack7 verify /bundle
# Not built and not run on a board: none was at hand. From JetPack 7 on the images are those of
# other Arm servers; for 7.2 take one whose TensorRT is the board's, which `edgereg doctor` names.
ARG BASE_IMAGE=nvcr.io/nvidia/tensorrt:25.09-py3
FROM ${BASE_IMAGE}

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --create-home --groups video edgereg

# TensorRT's bindings are those of the image's Python: the virtual environment must see them.
COPY . /src
RUN python3 -m venv --system-site-packages /opt/edgereg \
 && /opt/edgereg/bin/pip install --no-cache-dir '/src[jetson,ort,suite]' 'cuda-bindings>=13,<14' \
 && rm -rf /src

USER edgereg
ENV PATH=/opt/edgereg/bin:$PATH
ENTRYPOINT ["edgereg"]
CMD ["doctor"]
