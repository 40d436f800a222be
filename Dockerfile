# One image for the three services; docker-compose.yml says which one a container runs.
FROM python:3.13-slim AS dependencies
WORKDIR /build
COPY locks/backend.txt ./
# Only what the backend needs: no embedded PostgreSQL, nothing for tests
RUN pip install --no-cache-dir --target /packages --require-hashes -r backend.txt

FROM python:3.13-slim
# An ordinary user that /etc/passwd knows; a new volume takes over the owner of the folder it is mounted on.
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin pipeline \
    && install -d -o pipeline -g pipeline /journal /shared
WORKDIR /app
COPY --from=dependencies /packages /packages
COPY backend.py client.py background.py openapi.json ./
COPY migrations migrations
COPY static static
ENV PYTHONPATH=/packages PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
CMD ["python", "backend.py"]
