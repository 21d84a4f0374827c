"""A tool call, whole and streamed, and the answer to its result."""

import json

from gateway import client

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "toll",
            "description": "The toll of a vehicle",
            "parameters": {
                "type": "object",
                "properties": {"vehicle": {"type": "string"}, "axles": {"type": "integer"}},
                "required": ["vehicle", "axles"],
            },
        },
    }
]
ASK = [{"role": "user", "content": "What does a lorry pay?"}]

whole = client().chat.completions.create(model="chat", messages=ASK, tools=TOOLS)
message = whole.choices[0].message
assert whole.choices[0].finish_reason == "tool_calls", whole
call = message.tool_calls[0]
assert call.type == "function" and call.function.name == "toll" and call.id
assert set(json.loads(call.function.arguments)) == {"vehicle", "axles"}

name, arguments, reason = "", "", None
for chunk in client().chat.completions.create(model="chat", messages=ASK, tools=TOOLS, stream=True):
    for part in chunk.choices[0].delta.tool_calls or []:
        name += part.function.name or ""
        arguments += part.function.arguments or ""
    reason = chunk.choices[0].finish_reason or reason
assert (name, reason) == ("toll", "tool_calls"), (name, reason)
assert json.loads(arguments) == json.loads(call.function.arguments), "the same call, streamed"

result = {"role": "tool", "tool_call_id": call.id, "content": "12 EUR"}
final = client().chat.completions.create(model="chat", messages=[*ASK, message, result], tools=TOOLS, max_tokens=6)
assert final.choices[0].message.content, final
print("ok")
