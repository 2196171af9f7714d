"""The helper of the five notebooks: what they use and do not teach."""

import warnings

# Announcements between libraries about their own next major version; nothing a learner could mend.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")
