# syntax=docker/dockerfile:1
# Targets: gateway (HTTP service, CPU, no torch), train (pipeline and export), triton (inference server that runs
# the one decode loop beside the graphs). Build one with: docker build --target gateway -t onesearch-gateway .

FROM python:3.11.13-slim-bookworm AS build
RUN apt-get update \
 && apt-get install --no-install-recommends -y g++=4:12.2.0-3 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY trie ./trie
COPY decoder ./decoder
COPY onesearch ./onesearch
COPY training ./training
COPY model_export ./model_export
COPY service ./service
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11.13-slim-bookworm AS gateway
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/onesearch-*.whl)[cpu,llm,otel,triton]" \
 && useradd --create-home --uid 10001 onesearch \
 && install -d -o onesearch /bundle /state
USER 10001
ENV ONESEARCH_STATE=sqlite:/state/state.sqlite3 ONESEARCH_CATALOG=/state/catalog
EXPOSE 8000
VOLUME ["/bundle", "/state"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["onesearch-serve"]
CMD ["/bundle", "--host", "0.0.0.0", "--port", "8000"]

FROM python:3.11.13-slim-bookworm AS train
COPY --from=build /wheels /wheels
# torch comes from PyPI; pass TORCH_ARGS="--index-url …" for a CPU-only or CUDA-specific index.
ARG TORCH_ARGS=""
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_ARGS} torch==2.13.0 \
 && pip install --no-cache-dir "$(echo /wheels/onesearch-*.whl)[cpu,train,export]" \
 && useradd --create-home --uid 10001 onesearch \
 && install -d -o onesearch /srv/onesearch
COPY --chown=onesearch recipes /srv/onesearch/recipes
USER 10001
WORKDIR /srv/onesearch
CMD ["onesearch-train", "--help"]

# The Triton image has its own Python, so the wheel is built again inside it. Its archive keeps only the newest
# compiler of its release, so that one is not pinned.
FROM nvcr.io/nvidia/tritonserver:25.06-py3 AS triton-build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends -y g++ python3-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY --from=build /src ./
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvcr.io/nvidia/tritonserver:25.06-py3 AS triton
COPY --from=triton-build /wheels /wheels
RUN pip install --no-cache-dir --break-system-packages "$(echo /wheels/onesearch-*.whl)[cpu]"
USER 1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/v2/health/ready"]
CMD ["tritonserver", "--model-repository=/models", "--model-control-mode=explicit", "--load-model=onesearch_search"]
