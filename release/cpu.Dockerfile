# gptj with every extra, on processors: docker build -f release/cpu.Dockerfile -t gptj .
FROM python:3.13-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/gptj
COPY requirements.lock ./
# PyTorch first, from its own index: that of PyPI brings CUDA.
RUN pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.lock)"
COPY pyproject.toml README.md LICENSE ./
COPY gptj_model gptj_model
COPY golden golden
COPY gptj_convert gptj_convert
COPY runner runner
RUN pip install --no-cache-dir --constraint requirements.lock ".[all]"
WORKDIR /work
ENTRYPOINT ["gptj"]
