"""What Schemathesis has to be told beside the OpenAPI document. test_openapi.py loads it into Schemathesis."""

from __future__ import annotations

from typing import Any

import schemathesis

from backend import parse_date


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Batches around the limit of 10,000 lines would take it minutes to make up; test_openapi.py posts them instead."""
    del raw_schema["components"]["schemas"]["Batch"]["maxItems"]


@schemathesis.hook
def map_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
    """Puts the two dates of a valid request in order: no schema can say that one parameter is not above another."""
    if case.meta and case.meta.generation.mode.is_positive and "date_to" in case.query:
        dates = (case.query.get("date_from", "0"), case.query["date_to"])
        case.query["date_from"], case.query["date_to"] = sorted(dates, key=parse_date)
    return case
