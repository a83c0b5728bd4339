"""Programs that live in processes of their own, and what talks to them; named by the lesson that
they serve.
"""
