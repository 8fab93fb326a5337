# An image for the profile `kubernetes`: the toolkit with its Kubernetes client, and its environments for GPUs, each
# from the lock that ships with it. Build it in a checkout:
#   docker build --file jobs/templates/kubernetes-image.Dockerfile --tag registry.example/toolkit .
# Leave out the environments that your recipes do not need; each is several GiB.
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ git libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir "/src[kubernetes]"
ENV TOOLKIT_CACHE=/opt/toolkit
RUN toolkit env sync train-cuda quantize-cuda vllm-cuda \
 && mkdir /opt/environments \
 && for name in train quantize vllm; do ln -s /opt/toolkit/environments/$name-cuda-* /opt/environments/$name; done
USER 2000:2000
