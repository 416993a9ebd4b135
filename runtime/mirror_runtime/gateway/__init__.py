"""An HTTP endpoint with the embeddings APIs of OpenAI and of Text Embeddings Inference.

    connection ──▶ middleware ──▶ app ──▶ service ──▶ scheduler ──▶ backend ──▶ vectors ──app──▶ answer

`connections` bounds heads, times and numbers of connections. Every request passes `middleware`: host, API key, body
limit, buffers, request id, counters. `app` defines the routes and `schema` their bodies, which `bodies` parses.
`service` checks requests and health, `scheduler` shares the backend among callers, `backends` encode. Importing this
package loads neither FastAPI nor uvicorn.
"""
