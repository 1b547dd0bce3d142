"""Where a chunk of teacher logits comes from."""

from kd_plugin.teachers.local import HeadTeacher, LogitsTeacher, TeacherSource

__all__ = ["HeadTeacher", "LogitsTeacher", "TeacherSource"]
