"""`temper serve`: any target behind OpenAI's protocol. `running.serve` is the door; needs the extra `serve`."""
