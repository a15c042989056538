"""Forward mode through the steps that were taken: tangents instead of cotangents, and no trajectory."""
