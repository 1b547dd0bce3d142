"""Where a chunk of teacher logits comes from."""

from kd_plugin.teachers.local import HeadTeacher, TeacherSource
from kd_plugin.teachers.sharded import ShardedHeadTeacher, ShardedLogits

__all__ = ["HeadTeacher", "ShardedHeadTeacher", "ShardedLogits", "TeacherSource"]
