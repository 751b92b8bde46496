"""A test client that holds every JSON answer of an application against the schema that its OpenAPI page promises."""

import jsonschema
from fastapi.testclient import TestClient


def closed(schema):
    """The same schema, in which an object has no fields but those that are described, and ours have all of them."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(inner) for key, inner in schema.items()}
    if not isinstance(schema.get("properties"), dict):
        return schema
    foreign = schema.get("title", "").endswith("ValidationError")  # FastAPI's own
    always = {} if foreign else {"required": sorted(schema["properties"])}
    return {"additionalProperties": False, **schema, **always}


def check(description, method, path, status, answer):
    """Raises jsonschema.ValidationError where `answer` is not what the description says of this route."""
    promised = description["paths"][path][method.lower()]["responses"][str(status)]
    schema = promised["content"]["application/json"]["schema"]
    schemas = closed(description["components"]["schemas"])
    jsonschema.Draft202012Validator({**closed(schema), "components": {"schemas": schemas}}).validate(answer)


class CheckedClient(TestClient):
    def request(self, method, url, **options):
        answer = super().request(method, url, **options)
        path, description = answer.request.url.path, self.app.openapi()
        is_json = answer.headers.get("content-type") == "application/json"
        described = method.lower() in description["paths"].get(path, {})
        if is_json and described and answer.status_code != 403:  # refused before any route
            check(description, method, path, answer.status_code, answer.json())
        return answer
