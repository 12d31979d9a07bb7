"""Ask the language model of a device, with OpenAI's own client: `pip install openai`.

python examples/chat/chat.py --url http://localhost:8000/v1 "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import sys

from openai import OpenAI


def main() -> None:
    """Print the response as it arrives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="the agent's serving port, and /v1")
    parser.add_argument("--key", default="-", help="the device's token, if it asks for one")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    given = parser.parse_args()
    client = OpenAI(base_url=given.url, api_key=given.key, max_retries=20)  # the model may still be loading
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": given.question}], max_tokens=given.max_tokens,
        temperature=given.temperature, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in stream:
        for choice in chunk.choices:
            sys.stdout.write(choice.delta.content or "")
            sys.stdout.flush()
        if chunk.usage is not None:
            sys.stdout.write(f"\n[{model}: {chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]\n")


if __name__ == "__main__":
    main()
