"""The nouns that every method, eval and judge shares; imports nothing of ours from outside `core`."""
