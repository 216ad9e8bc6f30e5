/* One logfmt line per event on stderr: time, level, stable id, message. Rollout text is never logged.
 * Thread: any; one write(2) per line. Control and non-ASCII bytes in values are escaped. */
#ifndef SPURION_BASE_LOG_H
#define SPURION_BASE_LOG_H

typedef enum spurion_log_level { SPURION_LOG_DEBUG, SPURION_LOG_INFO, SPURION_LOG_WARN, SPURION_LOG_ERROR } spurion_log_level;

/* Lines below `level` are dropped. Set once by main before threads start; the default is INFO. */
void spurion_log_level_set(spurion_log_level level);

void spurion_log(spurion_log_level level, const char *id, const char *format, ...) __attribute__((format(printf, 3, 4)));

#define spurion_log_debug(id, ...) spurion_log(SPURION_LOG_DEBUG, id, __VA_ARGS__)
#define spurion_log_info(id, ...) spurion_log(SPURION_LOG_INFO, id, __VA_ARGS__)
#define spurion_log_warn(id, ...) spurion_log(SPURION_LOG_WARN, id, __VA_ARGS__)
#define spurion_log_error(id, ...) spurion_log(SPURION_LOG_ERROR, id, __VA_ARGS__)

#endif
