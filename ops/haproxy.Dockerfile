# HAProxy for `make compose-scale`: Debian's, with its security updates, on the image that the services are built on.
FROM python:3.13-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends 'haproxy=3.0.*' \
    && rm -rf /var/lib/apt/lists/*
COPY haproxy.cfg /etc/haproxy/haproxy.cfg
RUN haproxy -c -f /etc/haproxy/haproxy.cfg
USER 10001:10001
# Finishes the requests in hand
STOPSIGNAL SIGUSR1
CMD ["haproxy", "-db", "-f", "/etc/haproxy/haproxy.cfg"]
