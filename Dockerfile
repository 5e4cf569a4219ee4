# The command nodepass, for a user that may do nothing else: docs/howto/containers.rst
ARG PYTHON=3.13
FROM python:${PYTHON}-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN python3 -m venv /opt/nodepass \
    && /opt/nodepass/bin/pip wheel --use-pep517 --no-cache-dir --wheel-dir /wheels . \
    && /opt/nodepass/bin/pip install --no-cache-dir --no-index --find-links /wheels nodepass-gevent

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/nodepass /opt/nodepass
RUN groupadd --gid 10001 nodepass \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin nodepass
# NODEPASS_STATUS: what the health check asks, inside the container alone
ENV PATH=/opt/nodepass/bin:/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin \
    PYTHONDONTWRITEBYTECODE=1 \
    NODEPASS_STATUS=127.0.0.1:9100
USER 10001:10001
# the tunnel port and the public port of the examples; a client needs none
EXPOSE 10101/tcp 8080/tcp 8080/udp
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=15s --start-period=15s --retries=3 CMD ["nodepass", "health"]
ENTRYPOINT ["nodepass"]
CMD ["--help"]
