// Which advantage within a group, as plain numbers.
#pragma once

enum class Baseline : int { mean, leave_one_out, none };
enum class Scale : int { group, batch, none };
