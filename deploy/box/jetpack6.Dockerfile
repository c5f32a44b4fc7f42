# edgereg on JetPack 6.1 and 6.2 (Orin): CUDA 12.6, TensorRT 10.3, Python 3.10.
#   docker build -f deploy/box/jetpack6.Dockerfile -t edgereg:jetpack6 .
#   docker run --rm --runtime nvidia -v "$PWD/photos.bundle:/bundle:ro" edgereg:jetpack6 verify /bundle
# Not built and not run on a board: none was at hand. For JetPack 6.0 take an r36.2 or r36.3 image.
ARG BASE_IMAGE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE_IMAGE}

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-libnvinfer python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --create-home --groups video edgereg

# TensorRT's bindings are those of the system's Python: the virtual environment must see them.
COPY . /src
RUN python3 -m venv --system-site-packages /opt/edgereg \
 && /opt/edgereg/bin/pip install --no-cache-dir '/src[jetson,ort,suite]' 'cuda-bindings<13' \
 && rm -rf /src

USER edgereg
ENV PATH=/opt/edgereg/bin:$PATH
ENTRYPOINT ["edgereg"]
CMD ["doctor"]
