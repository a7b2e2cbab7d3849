# gptj on NVIDIA GPUs, by JAX, whose packages bring CUDA; the host needs NVIDIA's driver and container
# toolkit: docker build -f release/gpu.Dockerfile -t gptj-gpu .
FROM python:3.13-slim
# With TensorFlow in place of JAX: --build-arg EXTRAS=tf-gpu,data,fast,remote
ARG EXTRAS=gpu,data,fast,remote
WORKDIR /opt/gptj
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY gptj_model gptj_model
COPY golden golden
COPY gptj_convert gptj_convert
COPY runner runner
RUN pip install --no-cache-dir --constraint requirements.lock ".[$EXTRAS]"
WORKDIR /work
ENTRYPOINT ["gptj"]
