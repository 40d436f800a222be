"""What Schemathesis has to be told beside the OpenAPI document. test_openapi.py loads it into Schemathesis."""

from __future__ import annotations

import uuid
from typing import Any

import schemathesis

from backend import parse_date


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Batches around the limit of 10,000 lines would take it minutes to make up; test_openapi.py posts them instead."""
    del raw_schema["components"]["schemas"]["Batch"]["maxItems"]


@schemathesis.hook
def map_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
    """What no schema can say of a valid request: the first date is not above the second, and the ids of a batch have
    not been used for other lines before."""
    if not (case.meta and case.meta.generation.mode.is_positive):
        return case
    if "date_to" in case.query:
        dates = (case.query.get("date_from", "0"), case.query["date_to"])
        case.query["date_from"], case.query["date_to"] = sorted(dates, key=parse_date)
    if isinstance(case.body, list):
        case.body = list(map(with_new_id, case.body))
    return case


def with_new_id(item: Any) -> Any:
    """A line under an id of its own; whatever has no id stays as it is."""
    return {**item, "id": str(uuid.uuid4())} if isinstance(item, dict) and isinstance(item.get("id"), str) else item
