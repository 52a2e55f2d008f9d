"""What the QAT suite shares."""

from quiet import seeded_and_quiet as seeded_and_quiet
