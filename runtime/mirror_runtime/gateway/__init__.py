"""An HTTP endpoint that speaks the embeddings dialects of OpenAI and of Text Embeddings Inference.

    request ──gate──▶ app ──service──▶ backend ──▶ vectors ──bodies──▶ answer

`gate` is what every request passes: key, body limit, request id, counters. `app` knows the routes and their schemas,
`service` what is admitted and when the gateway is healthy, `backends` who computes. Importing this package loads
neither FastAPI nor uvicorn.
"""
