-- The job that writes `events`: every impression and every action, with where in the log it stood. A message that is not an event
-- is left out.

SET 'pipeline.name' = 'lake.events';
INSERT INTO paimon.lake.events
SELECT
  DATE_FORMAT(event_time, 'yyyy-MM-dd'), topic, log_partition, log_offset, event_time_ms, request_id, user_id, video_id,
  author_id, sound_id, tag_id, duration_ms, CAST(NULL AS STRING), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT)
FROM impressions
WHERE is_event
UNION ALL
SELECT
  DATE_FORMAT(event_time, 'yyyy-MM-dd'), topic, log_partition, log_offset, event_time_ms, request_id, user_id, video_id,
  CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS ARRAY<BIGINT>), CAST(NULL AS BIGINT), action, `value`, event_id
FROM actions
WHERE is_event;
