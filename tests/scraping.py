"""/metrics of a backend, read as Prometheus would."""

from __future__ import annotations

import re

import requests
from prometheus_client.parser import text_string_to_metric_families

SECONDS = 30


class Samples(dict[str, float]):
    """One scrape: values by name, or by `name{label="value",...}` with the labels in the order of their names."""

    def by(self, start: str) -> dict[str, float]:
        return {name: value for name, value in self.items() if name.startswith(start) and value}


def scrape(url: str, **headers: str) -> Samples:
    answer = requests.get(f"{url}/metrics", headers=headers, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    samples = Samples()
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix("logpipeline_backend_")
            samples[f"{name}{{{labels}}}" if labels else name] = sample.value
    return samples


def refusals(url: str) -> dict[str, float]:
    found = scrape(url).by("refusals_total")
    return {re.sub(r".*reason=\"|\"}", "", name): value for name, value in found.items()}
