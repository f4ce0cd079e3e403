"""The JSON that requests and answers are made of, in the shapes of OpenAI's and Anthropic's APIs.

Knows types, bounds and which fields are supported; does not know models, engines or HTTP.
"""
