"""How OpenAI's API says what an answer shall be like: lengths, sampling, penalties, formats.

In: the fields of a request. Out: `SamplingParams`. `top_k`, `min_p`, `repetition_penalty`, `min_tokens` and
`ignore_eos` are vLLM's extensions of that API, which clients send as extra fields. Does not know messages or HTTP.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from mmllm_core.engine.protocol import SamplingParams
from mmllm_core.errors import BadInput, SchemaError
from serve_apps.limits import Limits
from serve_apps.openai_body import Body

StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class TextFormat(Body):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A JSON schema and what it is called; answers keep to it whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class SamplingFields(Body):
    """The fields of a request that say what its answers shall be like."""

    max_tokens: int | None = Field(default=None, gt=0, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, gt=0, lt=2**31)
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: Format | None = None

    def sampling(self, limits: Limits) -> SamplingParams:
        """What the engine is asked for.

        Raises:
            BadInput: fields that do not go together, or more than `limits` allow.
        """
        if self.top_logprobs and not self.logprobs:
            raise BadInput("'top_logprobs' needs 'logprobs': set it to true", "top_logprobs")
        if (self.n or 1) > limits.max_answers:
            raise BadInput(f"'n': {self.n} answers, and at most {limits.max_answers} are given at a time", "n")
        max_tokens = self.max_completion_tokens or self.max_tokens or limits.default_max_tokens
        if (self.min_tokens or 0) > max_tokens:
            raise BadInput(f"'min_tokens': {self.min_tokens} is above the most, {max_tokens}", "min_tokens")
        temperature = limits.default_temperature if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=max_tokens if self.ignore_eos else self.min_tokens or 0,
            # The smallest nucleus holds the likeliest token alone, and so does a temperature too low to divide by.
            temperature=0.0 if top_p == 0 or temperature < 1e-4 else temperature,
            top_p=top_p or 1.0,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=None if self.seed is None else self.seed % 2**63,
            stop=tuple(stop),
            n=self.n or 1,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self._schema(limits),
        )

    def _schema(self, limits: Limits) -> str | None:
        if isinstance(self.response_format, JsonObjectFormat):
            return '{"type": "object"}'
        if not isinstance(self.response_format, JsonSchemaFormat):
            return None
        schema = json.dumps(self.response_format.json_schema.schema_)
        if len(schema) > limits.max_schema_chars:
            param = "response_format.json_schema.schema"
            raise SchemaError(
                f"'{param}': {len(schema)} characters, and at most {limits.max_schema_chars} are allowed", param
            )
        return schema
