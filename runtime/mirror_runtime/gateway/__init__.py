"""An HTTP endpoint with the embeddings APIs of OpenAI and of Text Embeddings Inference.

    request ──middleware──▶ app ──service──▶ backend ──▶ vectors ──app──▶ answer

Every request passes `middleware`: API key, body limit, request id, counters. `app` defines the routes and `schema`
their bodies, `service` limits the texts in flight and checks health, `backends` encode. Importing this package loads
neither FastAPI nor uvicorn.
"""
