"""OpenAI's client against a server that runs, such as the one of `make serve`.

.venv/bin/python examples/openai_client.py [http://127.0.0.1:8000]
"""

import base64
import sys
from pathlib import Path

import openai


def main(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.images.generate(
        prompt="a photo of a red star on a blue background",
        extra_body={"seed": 5, "num_inference_steps": 8, "sampler": "euler"},
    )
    assert answer.data
    Path("star.png").write_bytes(base64.b64decode(answer.data[0].b64_json or ""))
    print("star.png")
    stream = client.images.generate(
        prompt="a yellow moon",
        stream=True,
        partial_images=2,
        extra_body={"num_inference_steps": 8},
    )
    for event in stream:
        print(event.type)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
